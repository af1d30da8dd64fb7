"""The demo: images by the shipped model, then all four parts of a system trained from scratch and judged."""

DEMO_STEPS = (1_500, 1_000, 500)  # training steps of the dVAE, the transformer and CLIP: 11 minutes on two cores
