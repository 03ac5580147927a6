"""The hybrid cache: states of KDA layers, latents of MLA layers, taking back, sessions."""
