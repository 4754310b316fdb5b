"""What a recipe takes, before weights are downloaded: memory by part, disk, hours and money.

`plan.plan` is what the command calls. `measure` runs each phase once on tensors without data (`meter`), over models
from configs (`shapes`), the recipe's own rows (`rows`) and the trainer's own step (`step`). `cards` is the table of
cards.
"""
