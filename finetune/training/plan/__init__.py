"""What a recipe takes, before weights are downloaded: memory by part, disk, hours and money.

`plan.plan` is the command; `measure` runs each phase once on tensors without data (`meter`), built from configs (`shapes`)
over the recipe's own rows (`rows`), with the trainer's own step (`step`); `cards` is the table of cards.
"""
