"""Files of strangers, and the 16-bit model in them. Nothing here trusts what it reads."""
