"""Several processes that train one model: who they are, how the model lies on them, how they compute."""
