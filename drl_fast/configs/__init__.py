"""One file per row of the ablation; the data set is an option. Shipped as drl_fast.configs."""
