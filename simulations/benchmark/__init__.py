"""What the platform costs: whole rounds against its peers (``fedlora bench``), and its parts one by one."""
