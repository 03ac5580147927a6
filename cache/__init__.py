"""The hybrid cache: states of KDA layers, latents of MLA layers, rollback, sessions."""
