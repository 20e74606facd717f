# Pyright reads all models of transformers to know its names: 21 of 98 seconds (`pyright --stats`). This stands in
# their place.
from typing import Any

def __getattr__(name: str) -> Any: ...
