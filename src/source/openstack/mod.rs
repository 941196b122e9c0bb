//! What OpenStack's services say, as values: `clouds.yaml`, keystone's tokens and catalog, and Glance's image records.
//!
//! This module does no I/O, so that each word of a server and of a file is tested alone. `source::http` sends the
//! requests. What must hold:
//! - Only the credential helper has a [`Cloud`], which holds a password or a secret. A worker gets a [`Session`]: a token
//!   that ends, and two endpoints.
//! - No `Debug`, message or error shows a password, a secret or a token.
//! - A field that is absent or of another type is an error with the field's name, never a default.

mod clouds;
mod image;
mod keystone;
mod place;
#[cfg(test)]
mod tests;

pub use clouds::{Cloud, find};
pub use image::{ImagePage, ImageRecord, Location, Matches};
pub use keystone::{Endpoint, Session};
pub use place::{ImagePlace, ObjectPlace, Whereabouts};
