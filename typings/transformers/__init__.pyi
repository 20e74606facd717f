# Pyright reads all models of transformers to know its names: 20 of 80 seconds. This stands in their place.
from typing import Any

def __getattr__(name: str) -> Any: ...
