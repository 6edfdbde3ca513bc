"""From a model's name to files on this machine: names, what a repository holds, the download, the check."""
