//! AES-256-XTS (IEEE 1619) of a block of 4096 bytes, its number as the tweak.
//!
//! The mode is here, around the AES of a library, because the library of the mode encrypts 16 bytes at a time, and
//! processors work on many at once. A test compares both.

use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use zeroize::Zeroize;

use super::{Aes, KEY};
use crate::format::BLOCK;

const UNITS: usize = BLOCK as usize / 16;

/// Two keys of AES.
pub(super) struct Xts {
    data: Aes,
    tweak: Aes,
}

impl Xts {
    pub(super) fn new(key: &[u8; KEY]) -> Self {
        let mut half = [0; KEY / 2];
        let mut of = |bytes: &[u8]| {
            half.copy_from_slice(bytes);
            let aes = Aes::new(&half.into());
            half.zeroize();
            aes
        };
        let (data, tweak) = (of(&key[..KEY / 2]), of(&key[KEY / 2..]));
        Self { data, tweak }
    }

    /// Encrypts whole blocks, the first of which has the number `first`.
    pub(super) fn encrypt(&self, bytes: &mut [u8], first: u64) {
        self.each(bytes, first, |units| self.data.encrypt_blocks(units));
    }

    /// Decrypts whole blocks, the first of which has the number `first`.
    pub(super) fn decrypt(&self, bytes: &mut [u8], first: u64) {
        self.each(bytes, first, |units| self.data.decrypt_blocks(units));
    }

    fn each(
        &self,
        bytes: &mut [u8],
        first: u64,
        cipher: impl Fn(&mut [Array<u8, aes::cipher::consts::U16>]),
    ) {
        debug_assert!(bytes.len().is_multiple_of(BLOCK as usize), "whole blocks");
        for (block, number) in bytes.chunks_exact_mut(BLOCK as usize).zip(first..) {
            let mut tweak = Array(u128::from(number).to_le_bytes());
            self.tweak.encrypt_block(&mut tweak);
            let mut next = u128::from_le_bytes(tweak.0);
            let mut tweaks = [0; UNITS];
            for tweak in &mut tweaks {
                *tweak = next;
                // Multiplication by x in GF(2^128).
                let carry = if next >> 127 == 0 { 0 } else { 0x87 };
                next = (next << 1) ^ carry;
            }
            let (units, _) = Array::slice_as_chunks_mut(block);
            mask(units, &tweaks);
            cipher(units);
            mask(units, &tweaks);
        }
    }
}

fn mask(units: &mut [Array<u8, aes::cipher::consts::U16>], tweaks: &[u128; UNITS]) {
    for (unit, tweak) in units.iter_mut().zip(tweaks) {
        unit.0 = (u128::from_le_bytes(unit.0) ^ tweak).to_le_bytes();
    }
}
