"""Prepared cases and cached latents become batches: splits, crops, flips, pairs, resumable order."""
