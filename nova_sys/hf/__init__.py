"""Hugging Face folders in and out.

families.py      which tensors a family of models has, and where they lie in ours: the tables
config_json.py   config.json <-> [model]
folder.py        a folder's tensors: found, checked, read by slices
weights.py       the tables at work, both ways
dist_files.py    a checkpoint of ours, tensor by tensor
convert.py       `nova convert`
"""
