"""What a diffusion model is made of: schedules and paths, objectives, samplers, conditioners and the first
stage.
"""
