"""A page in the browser, on this machine or as a Space of the Hugging Face Hub."""
