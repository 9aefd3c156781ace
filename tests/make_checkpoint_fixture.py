"""Make fixtures/google: a tiny BERT as Google published it, written by TensorFlow.

    python tests/make_checkpoint_fixture.py        # needs tensorflow; the result is in the project

The same weights are in fixtures/bert.pt-like form inside hub.npz, under Hugging Face's names, so
that a test can compare both ways of reading them.
"""
