"""Training on many processes: process groups, sharded models, PowerSGD between nodes."""
