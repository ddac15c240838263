# The lab behind its own mirrors: every address is the site host's, by the keys that any site uses.
ssh_user = "root"
ssh_key = ".lab/id_ed25519"
ssh_known_hosts_file = ".lab/known_hosts"

mirrors = {
    "apt": {
        "debian": {"url": "http://10.86.0.2/apt/debian", "key": ".lab/lab.asc"},
        "nvidia": {"url": "http://10.86.0.2/apt/nvidia", "key": ".lab/lab.asc"},
    },
    "index": "http://10.86.0.2/simple",
    "nightly": "http://10.86.0.2/nightly",
    "git": {"https://github.com/": "http://10.86.0.2/git/"},
    "hub": "http://10.86.0.2/hub",
    "registry": "http://10.86.0.2",
}
