//! The keys of the contents of bases in the cache of fetched blocks.
//!
//! What must hold: two bases share a key for fetched contents only when both certainly get the same bytes: the same
//! URLs with the same strong validator. Otherwise the number of the base is a part of the key; no other base ever has
//! it. A digest is a claim of the operator. It is a key of its own, for contents that were compared with it.
//!
//! Contents of which each group is proven have one key, which follows from their root: bases share them from the first
//! byte, wherever each of them fetches from (D105). The hash of a file without a proof is a digest like any other.

use sha2::{Digest as _, Sha256};

use crate::fetch::kept::{FileKeys, SourceKey};
use crate::format::record::{BaseRecord, Digest, ImageFile, Strictness};
use crate::source::{KeyParts, key_parts, proven_key};

struct Key(Sha256);

impl Key {
    fn of(kind: &str) -> Self {
        Self(Sha256::new()).part(kind.as_bytes())
    }

    fn part(mut self, bytes: &[u8]) -> Self {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    fn of_size(self, size: u64) -> SourceKey {
        SourceKey(self.part(&size.to_le_bytes()).0.finalize().into())
    }
}

/// The keys of a file of a base. `inherited`: version 0.1.0 cached the contents, which must not be lost.
pub fn keys_of(base: &BaseRecord, file: &ImageFile, inherited: bool) -> FileKeys {
    let size = file.identity.size;
    if let Some(proof) = &file.proof {
        let own = match proof.places.is_empty() {
            true => own_key(base, file),
            false => SourceKey(proven_key(&proof.root, size)),
        };
        return FileKeys { own, digest: Some(Key::of("blake3").part(&proof.root).of_size(size)), size };
    }
    let own = match inherited && file.identity.digest.is_none() {
        true => older_key(file),
        false => own_key(base, file),
    };
    FileKeys { own, digest: file.identity.digest.as_ref().map(|digest| digest_key(digest, size)), size }
}

fn own_key(base: &BaseRecord, file: &ImageFile) -> SourceKey {
    let parts = key_parts(&file.identity.validator);
    let strong = parts.is_strong && base.options.strictness == Strictness::Strong;
    if strong && file.mirrors.is_empty() && file.identity.digest.is_none() && file.proof.is_none() {
        return older_key(file);
    }
    let mut key = Key::of("own").part(file.source.as_bytes()).part(&file.mirrors.len().to_le_bytes());
    key = file.mirrors.iter().fold(key, |key, mirror| key.part(mirror.as_bytes()));
    key = parts.parts.iter().fold(key.part(parts.label.as_bytes()), |key, part| key.part(part));
    key = match &file.identity.digest {
        Some(Digest::Sha256(digest)) => key.part(digest),
        Some(Digest::Sha512(digest)) => key.part(digest),
        None => key.part(&[]),
    };
    if let Some(proof) = &file.proof {
        key = key.part(&proof.root);
    }
    if !strong {
        key = key.part(&base.id.to_le_bytes());
    }
    key.of_size(file.identity.size)
}

/// The key of contents that were compared with a digest.
fn digest_key(digest: &Digest, size: u64) -> SourceKey {
    match digest {
        Digest::Sha256(digest) => Key::of("sha256").part(digest),
        Digest::Sha512(digest) => Key::of("sha512").part(digest),
    }
    .of_size(size)
}

/// The key of version 0.1.0 for a file without a digest.
pub fn older_key(file: &ImageFile) -> SourceKey {
    let KeyParts { label, parts, .. } = key_parts(&file.identity.validator);
    let key = parts.iter().fold(Key::of(label).part(file.source.as_bytes()), |key, part| key.part(part));
    key.of_size(file.identity.size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::record::{BaseIdentity, BaseOptions, FileProof, ImageFormat, Validator};

    fn base(validator: Validator, digest: Option<Digest>, mirrors: &[&str]) -> BaseRecord {
        let image = ImageFile {
            source: "https://h/a.raw".into(),
            mirrors: mirrors.iter().map(|url| (*url).to_owned()).collect(),
            format: ImageFormat::Raw,
            disk_size: 5000,
            identity: BaseIdentity { size: 5000, validator, digest },
            proof: None,
        };
        BaseRecord {
            id: 7,
            name: "b".into(),
            image,
            backing: Vec::new(),
            created_ns: 0,
            options: BaseOptions::default(),
            moved: Vec::new(),
            token: None,
        }
    }

    fn http(etag: Option<&str>, last_modified: Option<&str>) -> Validator {
        Validator::Http { etag: etag.map(Into::into), last_modified: last_modified.map(Into::into) }
    }

    /// Guards D105.
    #[test]
    fn proven_contents_have_one_key_and_a_hash_without_a_proof_is_a_digest() {
        let of = |validator: Validator, mirrors: &[&str], places: &[&str]| {
            let mut base = base(validator, None, mirrors);
            let places = places.iter().map(|place| (*place).to_owned()).collect();
            base.image.proof = Some(FileProof { root: [9; 32], places });
            base
        };
        let tag = |tag: &str| http(Some(tag), None);
        let keys = |base: &BaseRecord| keys_of(base, &base.image, false);
        let proven = keys(&of(tag("\"a\""), &[], &["https://h/a.obao"]));
        let other = keys(&of(tag("W/\"b\""), &["https://m/x"], &["/srv/b.obao"]));
        let local = keys(&of(Validator::File { mtime_ns: 1, inode: 2 }, &[], &["/srv/b.obao"]));
        assert_eq!((proven, proven), (other, local));
        // Nothing that is not proven comes under that key.
        let claimed = keys(&of(tag("\"a\""), &[], &[]));
        let plain = keys(&base(tag("\"a\""), None, &[]));
        assert!(claimed.own != proven.own && plain.own != proven.own && claimed.own != plain.own);
        assert_eq!((claimed.digest, plain.digest), (proven.digest, None));
        assert_ne!(proven.digest, Some(proven.own));
    }

    /// Other keys would lose what the stores of all hosts have in `cache/`.
    #[test]
    fn the_keys_of_the_known_kinds_stay_what_they_are() {
        let hex = |key: SourceKey| hex::encode(&key.0[..8]);
        let file = || Validator::File { mtime_ns: 77, inode: 12 };
        let tag = || http(Some("\"abc\""), Some("Sat, 21 Nov 2026 10:00:00 GMT"));
        let sha256 = || Some(Digest::Sha256([7; 32]));
        let all = [
            base(file(), None, &[]),
            base(file(), sha256(), &[]),
            base(tag(), None, &[]),
            base(tag(), sha256(), &["http://m/a"]),
            base(http(Some("W/\"abc\""), None), None, &[]),
            base(http(None, Some("Sat, 21 Nov 2026 10:00:00 GMT")), None, &[]),
            base(http(None, None), Some(Digest::Sha512([9; 64])), &[]),
        ];
        let keys = all.iter().map(|base| {
            let of = keys_of(base, &base.image, false);
            let digest = of.digest.map(hex).unwrap_or_default();
            format!("{} {digest} {}", hex(of.own), hex(older_key(&base.image)))
        });
        // Own key, key of the digest, key of version 0.1.0.
        let expected = [
            "b11098f50af3de07  bfc890e3f17a95fc",
            "d1af0bf455828dc7 42291a5c4c40ea69 bfc890e3f17a95fc",
            "32b1df2d16b8427c  32b1df2d16b8427c",
            "235d90edb99f0e18 42291a5c4c40ea69 32b1df2d16b8427c",
            "e7e68ed0053244a3  011bddf1806c74b0",
            "197d51cb6291612e  197d51cb6291612e",
            "e8479adf75029e5a 07eea8184da2a649 55f0a2b28e2dbd48",
        ];
        assert_eq!(keys.collect::<Vec<_>>(), expected, "a store loses what it has cached");
    }
}
