"""The demo: all four models trained from nothing on drawn scenes, and judged."""

DEMO_STEPS = (1_500, 1_000, 500)  # updates of the dVAE, of the transformer, of CLIP: eleven minutes on two cores
