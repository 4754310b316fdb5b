"""The checks of `finetune doctor`. They import the libraries that they examine, each inside its function."""
