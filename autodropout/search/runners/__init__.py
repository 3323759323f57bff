"""Where trials are trained: in this process, in processes of this machine, on a Ray cluster."""
