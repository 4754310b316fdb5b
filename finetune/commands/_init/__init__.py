"""What `finetune init` consists of: files, columns, the task, parts for a card, the text of a recipe."""
