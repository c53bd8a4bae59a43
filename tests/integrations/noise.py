"""What the frameworks themselves warn about, and is none of our doing. Everything else is an error, as in all tests."""

HOSTS_OWN = [
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",  # Lightning, of torch
    "ignore:The '(train|val|test)_dataloader' does not have many workers:UserWarning",  # Lightning's advice
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT, of Transformers
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",  # Lightning, when a run goes on where it was saved
    "ignore:Could not find a config file in:UserWarning",  # PEFT, of a checkpoint that is one GGUF file
]
