"""Publishing: what is checked before an upload, the card, and the upload."""
