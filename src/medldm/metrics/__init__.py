"""Metrics of images and of sets of images, and the catalogue that defines each of them."""
