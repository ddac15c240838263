# Documentation addresses (RFC 5737): put your own in. `ssh_hostname` may be left out where the name resolves.
h200 = [
    ("h200-01", {"ssh_hostname": "198.51.100.11"}),
    ("h200-02", {"ssh_hostname": "198.51.100.12"}),
]
