"""Proxies as people write them. They run as scripts, in the virtual environment of the peers."""
