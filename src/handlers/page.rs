//! Pages by number: what clients may ask for, and what they are told of it.

use serde::Deserialize;

use crate::protocol::Meta;

/// Items on a page where the client does not say.
const PER_PAGE: i64 = 20;

/// A number of a page, from 1.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "i64")]
pub(crate) struct PageNumber(i64);

impl TryFrom<i64> for PageNumber {
    type Error = &'static str;

    fn try_from(page: i64) -> Result<Self, Self::Error> {
        (1..=i64::from(i32::MAX))
            .contains(&page)
            .then_some(Self(page))
            .ok_or("a page is 1 to 2147483647")
    }
}

/// Items on a page.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "i64")]
pub(crate) struct PerPage(i64);

impl TryFrom<i64> for PerPage {
    type Error = &'static str;

    fn try_from(items: i64) -> Result<Self, Self::Error> {
        (1..=100).contains(&items).then_some(Self(items)).ok_or("per_page is 1 to 100")
    }
}

impl Default for PageNumber {
    fn default() -> Self {
        Self(1)
    }
}

impl Default for PerPage {
    fn default() -> Self {
        Self(PER_PAGE)
    }
}

impl PerPage {
    /// As a number of items.
    pub(crate) fn items(self) -> i64 {
        self.0
    }
}

impl PageNumber {
    /// How many items the pages before it have.
    pub(crate) fn skip(self, per_page: PerPage) -> i64 {
        (self.0 - 1) * per_page.0
    }

    /// Where it stands among so many items in all.
    pub(crate) fn meta(self, per_page: PerPage, total: i64) -> Meta {
        let (page, per_page) = (self.0, per_page.0);
        let pages = (total + per_page - 1) / per_page;
        Meta { page, per_page, total, pages, next_cursor: None, has_more: page < pages }
    }
}
