"""What FLA's kernels need beside their calls: known launch configurations."""
