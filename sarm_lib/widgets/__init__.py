"""What a person drives in JupyterLab: the scrubber, the episode explorer (both on the player) and the κ and Δ explorer."""
