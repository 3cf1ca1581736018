"""What tests share: small detectors and views, whole runs in seconds, and several processes."""
