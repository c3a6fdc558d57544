//! What clients hold at once: sockets, bytes. Bounded together and for each address, so that one address
//! cannot take what all others need.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::config::network_of;

/// Addresses for which a table keeps its room.
const CROWD: usize = 256;

/// Why a pool gives nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// All of it is taken.
    Pool,
    /// The address holds as much as one address may.
    Address,
}

/// A bounded amount of something.
#[derive(Debug)]
pub(crate) struct Pool {
    most: usize,
    most_each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// By network, as long as it holds something.
    each: HashMap<IpAddr, usize>,
}

impl Pool {
    /// A pool of `most`, of which one address may hold `most_each`.
    pub(crate) fn new(most: usize, most_each: usize) -> Arc<Self> {
        Arc::new(Self { most, most_each, taken: Mutex::default() })
    }

    /// Takes an amount for an address; for none where the holder is exempt from the bound of an address.
    pub(crate) fn take(
        self: &Arc<Self>,
        holder: Option<IpAddr>,
        amount: usize,
    ) -> Result<Share, Full> {
        let mut share = Share { pool: Arc::clone(self), holder: holder.map(network_of), amount: 0 };
        share.grow(amount)?;
        Ok(share)
    }

    /// What is taken.
    pub(crate) fn taken(&self) -> usize {
        self.lock().all
    }

    /// Addresses that hold something.
    pub(crate) fn holders(&self) -> usize {
        self.lock().each.len()
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of a pool, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    pool: Arc<Pool>,
    holder: Option<IpAddr>,
    amount: usize,
}

impl Share {
    /// Takes more; on failure the share stays as it was.
    pub(crate) fn grow(&mut self, more: usize) -> Result<(), Full> {
        let mut taken = self.pool.lock();
        if more > self.pool.most - taken.all {
            return Err(Full::Pool);
        }
        // Nothing is no entry.
        if let Some(holder) = self.holder.filter(|_| more > 0) {
            match taken.each.entry(holder) {
                Entry::Occupied(mut held) => {
                    if more > self.pool.most_each.saturating_sub(*held.get()) {
                        return Err(Full::Address);
                    }
                    *held.get_mut() += more;
                }
                Entry::Vacant(_) if more > self.pool.most_each => return Err(Full::Address),
                Entry::Vacant(place) => drop(place.insert(more)),
            }
        }
        taken.all += more;
        self.amount += more;
        Ok(())
    }

    /// Whether more than half is taken of what the holder, or all holders, may have.
    pub(crate) fn is_scarce(&self) -> bool {
        let taken = self.pool.lock();
        let held = self.holder.and_then(|holder| taken.each.get(&holder)).copied().unwrap_or(0);
        taken.all > self.pool.most / 2 || held > self.pool.most_each / 2
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.pool.lock();
        taken.all -= self.amount;
        let Some(holder) = self.holder else { return };
        if let Entry::Occupied(mut held) = taken.each.entry(holder) {
            *held.get_mut() -= self.amount;
            if *held.get() == 0 {
                held.remove();
            }
        }
        // A crowd of addresses leaves no large table behind.
        if taken.each.is_empty() && taken.each.capacity() > CROWD {
            taken.each.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANN: &str = "10.0.0.1";
    const BEA: &str = "10.0.0.2";

    fn take(pool: &Arc<Pool>, holder: &str, amount: usize) -> Result<Share, Full> {
        pool.take(Some(holder.parse().unwrap()), amount)
    }

    #[test]
    fn an_address_holds_no_more_than_its_part_and_leaves_the_rest_to_others() {
        let pool = Pool::new(8, 2);
        let first = take(&pool, ANN, 1).unwrap();
        let _second = take(&pool, ANN, 1).unwrap();
        assert_eq!(take(&pool, ANN, 1).unwrap_err(), Full::Address);
        let _other = take(&pool, BEA, 2).unwrap();
        drop(first);
        let _third = take(&pool, ANN, 1).unwrap();
        assert_eq!((pool.taken(), pool.holders()), (4, 2));
    }

    #[test]
    fn the_pool_has_a_bound_over_all_addresses_and_for_exempt_holders_too() {
        let pool = Pool::new(3, 2);
        let _ann = take(&pool, ANN, 2).unwrap();
        let mut exempt = pool.take(None, 1).unwrap();
        assert_eq!(exempt.grow(1), Err(Full::Pool));
        assert_eq!(take(&pool, BEA, 1).unwrap_err(), Full::Pool);
    }

    #[test]
    fn all_addresses_of_an_ipv6_network_are_one_holder() {
        let pool = Pool::new(8, 1);
        let _one = take(&pool, "2001:db8::1", 1).unwrap();
        assert_eq!(take(&pool, "2001:db8::2", 1).unwrap_err(), Full::Address);
        assert!(take(&pool, "2001:db8:0:1::1", 1).is_ok());
        let _v4 = take(&pool, "::ffff:10.0.0.1", 1).unwrap();
        assert_eq!(take(&pool, ANN, 1).unwrap_err(), Full::Address);
    }

    #[test]
    fn what_is_dropped_is_given_back_and_no_entry_stays() {
        let pool = Pool::new(8, 8);
        let mut share = take(&pool, ANN, 3).unwrap();
        share.grow(5).unwrap();
        assert!(share.is_scarce());
        assert_eq!(share.grow(1), Err(Full::Pool));
        drop(share);
        assert_eq!((pool.taken(), pool.holders()), (0, 0));
    }
}
