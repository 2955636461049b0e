"""The methods, in the folders of the survey's taxonomy; one file each, found by the registry."""
