"""Data of the sampled families: images, tables and texts by name, each with four fixed splits, as tensors in memory.

Which data sets meta-training may see and which are held out is fixed in :mod:`lopt.tasks.data.catalogue`. Nothing is
downloaded and nothing is unpickled; data that is not here is an error that says which package brings it.
"""
