//! Under which keys the contents of bases lie in the cache of fetched blocks.
//!
//! What must hold: two bases have one key for what was fetched only when the same bytes are sure to come for both: the same
//! URLs with the same strong validator. Where the source cannot vouch for that over time, a part of the key is the base's
//! number, which is never another's. A digest is a claim; it is a key of its own, for what was compared with it.

use sha2::{Digest as _, Sha256};

use crate::fetch::kept::{FileKeys, SourceKey};
use crate::format::record::{BaseRecord, Digest, ImageFile, Strictness, Validator};

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

    fn text(self, text: Option<&String>) -> Self {
        self.part(text.map_or(&[], |text| text.as_bytes()))
    }

    fn of_size(self, size: u64) -> SourceKey {
        SourceKey(self.part(&size.to_le_bytes()).0.finalize().into())
    }
}

/// What a file of a base is called in the cache. `inherited`: version 0.1.0 kept it, and it must not be lost.
pub fn keys_of(base: &BaseRecord, file: &ImageFile, inherited: bool) -> FileKeys {
    let size = file.identity.size;
    let own = match inherited && file.identity.digest.is_none() {
        true => older_key(file),
        false => own_key(base, file),
    };
    FileKeys { own, digest: file.identity.digest.as_ref().map(|digest| digest_key(digest, size)), size }
}

/// Whether the same validator at the same place is the same contents at any time.
fn is_strong(base: &BaseRecord, file: &ImageFile) -> bool {
    let Validator::Http { etag, last_modified } = &file.identity.validator else { return false };
    let strong = etag.as_ref().map_or(last_modified.is_some(), |etag| !etag.starts_with("W/"));
    strong && base.options.strictness == Strictness::Strong
}

fn own_key(base: &BaseRecord, file: &ImageFile) -> SourceKey {
    let strong = is_strong(base, file);
    if strong && file.mirrors.is_empty() && file.identity.digest.is_none() {
        return older_key(file);
    }
    let mut key = Key::of("own").part(file.source.as_bytes()).part(&file.mirrors.len().to_le_bytes());
    for mirror in &file.mirrors {
        key = key.part(mirror.as_bytes());
    }
    key = match &file.identity.validator {
        Validator::Http { etag, last_modified } => {
            key.part(b"url").text(etag.as_ref()).text(last_modified.as_ref())
        }
        Validator::File { mtime_ns, inode } => {
            key.part(b"file").part(&mtime_ns.to_le_bytes()).part(&inode.to_le_bytes())
        }
    };
    key = match &file.identity.digest {
        Some(Digest::Sha256(digest)) => key.part(digest),
        Some(Digest::Sha512(digest)) => key.part(digest),
        None => key.part(&[]),
    };
    if !strong {
        key = key.part(&base.id.to_le_bytes());
    }
    key.of_size(file.identity.size)
}

/// The key of what was compared with a digest.
fn digest_key(digest: &Digest, size: u64) -> SourceKey {
    match digest {
        Digest::Sha256(digest) => Key::of("sha256").part(digest),
        Digest::Sha512(digest) => Key::of("sha512").part(digest),
    }
    .of_size(size)
}

/// The key that version 0.1.0 made of a file without a digest.
pub fn older_key(file: &ImageFile) -> SourceKey {
    match &file.identity.validator {
        Validator::Http { etag, last_modified } => {
            Key::of("url").part(file.source.as_bytes()).text(etag.as_ref()).text(last_modified.as_ref())
        }
        Validator::File { mtime_ns, inode } => Key::of("file")
            .part(file.source.as_bytes())
            .part(&mtime_ns.to_le_bytes())
            .part(&inode.to_le_bytes()),
    }
    .of_size(file.identity.size)
}
