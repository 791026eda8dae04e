"""A file a row of the ablation and data set, shipped as drl_fast.configs."""
