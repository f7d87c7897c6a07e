"""How routing is expressed in what is deployed, one file each."""
