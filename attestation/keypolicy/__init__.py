"""Key policies and grants of AWS KMS: what a key's policy says, whom it releases the key to, and what is wrong with it.

``document`` reads them, ``conditions`` evaluates one condition, ``decision`` says what KMS would decide and by what.
All of it is pure: who fetches the policy of a key, and who asks KMS, is elsewhere.
"""
