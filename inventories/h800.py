# Documentation addresses (RFC 5737): put your own in. `ssh_hostname` may be left out where the name resolves.
h800 = [
    ("h800-01", {"ssh_hostname": "203.0.113.11"}),
    ("h800-02", {"ssh_hostname": "203.0.113.12"}),
]
