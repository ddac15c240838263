# Documentation addresses (RFC 5737): put your own in. `ssh_hostname` may be left out where the name resolves.
h20 = [
    ("h20-01", {"ssh_hostname": "192.0.2.11"}),
    ("h20-02", {"ssh_hostname": "192.0.2.12"}),
    ("h20-03", {"ssh_hostname": "192.0.2.13"}),
]
