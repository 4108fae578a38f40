"""Isaac Lab's assets without a network: a mirror of the asset server, filled by a downloader."""
