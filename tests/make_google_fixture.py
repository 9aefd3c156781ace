"""Remakes fixtures/google.zip: the BERT of fixtures/bert.npz as Google published its models.
For developers; needs the package tensorflow: python tests/make_google_fixture.py
"""

import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tensorflow as tf

FIXTURES = Path(__file__).parent / "fixtures"
stored = np.load(FIXTURES / "bert.npz")
config = {name[7:]: stored[name].item() for name in stored if name.startswith("config/")}
tensors = {"global_step": np.array(7), "cls/predictions/output_bias": np.zeros(37, np.float32)}
for name in stored:
    if name.startswith("weights/"):
        parts = name.removeprefix("weights/").replace("layer.", "layer_").split(".")
        kind, value = parts.pop(), stored[name]
        if "LayerNorm" in parts:
            parts.append({"weight": "gamma", "bias": "beta"}[kind])
        elif not parts[-1].endswith("_embeddings"):
            parts.append({"weight": "kernel", "bias": "bias"}[kind])
            value = value.T
        path = "/".join(["bert", *parts])
        tensors |= {path: value, path + "/adam_m": value, path + "/adam_v": value**2}

with tempfile.TemporaryDirectory() as folder:
    names = sorted(tensors)
    tf.raw_ops.SaveV2(prefix=f"{folder}/bert_model.ckpt", tensor_names=names,
                      shape_and_slices=[""] * len(names),
                      tensors=[tf.constant(tensors[name]) for name in names])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"w{i}" for i in range(5, 37)]
    with zipfile.ZipFile(FIXTURES / "google.zip", "w", zipfile.ZIP_DEFLATED) as files:
        inside = "uncased_L-3_H-20_A-5/"
        files.writestr(inside + "bert_config.json", json.dumps(config))
        files.writestr(inside + "vocab.txt", "\n".join(words) + "\n")
        for path in sorted(Path(folder).iterdir()):
            files.write(path, inside + path.name)
