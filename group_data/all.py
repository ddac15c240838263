# Defaults of every site; a group's own data comes first.

# A host whose key is not known is refused: make it known (ssh-keyscan, then compare) before the first run.
ssh_strict_host_key_checking = "yes"
