"""Named bytes: files, keys, directories and object stores."""
