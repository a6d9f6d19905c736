import os

# Set before any Hugging Face import: the suite must neither reach a hub nor train on a GPU that happens to be there.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
# Models this small gain nothing from a second thread, and lose several times their time where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
