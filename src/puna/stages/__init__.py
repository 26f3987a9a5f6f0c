"""The recipe's stages, a file each; they never import one another and meet in files."""
