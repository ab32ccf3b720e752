"""Published models: to and from the folders of Hugging Face (config.json, safetensors), whatever the parallel layout.

    mapping.py   what a family is: fields of config.json, names of tensors
    llama.py, qwen.py, mixtral.py, olmoe.py, deepseek.py    the families, one page each
    logical.py   our tensors by key and global shape, and which blocks of published tensors each is made of
    source.py    a folder on disk: config.json, and slices of its safetensors
    read.py      boxes of our tensors out of a folder
    fill.py      fills the model of a rank
    write.py     safetensors in shards, written as a stream
    registry.py  which family a config.json is of

Imports and exports of checkpoints are in `train/hf_command.py`: `python -m model.hf`.
"""
