"""Checkpoints of a run: folders and their files, when one is saved and resumed, saving in the background."""
