"""The paper's tables as commands: one script per table, with the models, data and training loop they share."""
