"""Whole Wan2.2 clips: pipelines with random or real weights, timed part by part, and predicted."""
