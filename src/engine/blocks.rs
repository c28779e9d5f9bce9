//! Who owns which block of the cache, and which blocks already hold a given prefix. Ids only; the memory is the runner's.
//!
//! A block that several sequences own is full and was published before it was shared, and nobody writes into a published
//! block: growing always takes a fresh one. So there is no copy-on-write.

use std::collections::HashMap;
use std::sync::Arc;

use super::request::TokenId;
use super::step::BlockId;

/// Identity of a prefix that ends on a block boundary. Drawn afresh at every publication and never reused, so nothing can be
/// found through a parent that was recycled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct PrefixId(u64);

/// What a full block holds: these tokens after that prefix. Maps compare it whole; a hash alone decides nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct PrefixKey {
    parent: PrefixId,
    tokens: Vec<TokenId>,
}

/// Blocks of one sequence in order of position. Return it with [`BlockPool::release`]; dropping it loses the blocks.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    /// The prefix that the full blocks spell, and how many blocks that is.
    prefix: PrefixId,
    prefix_blocks: usize,
}

impl BlockTable {
    /// The blocks, first position first.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }
}

#[derive(Debug)]
struct Block {
    owner_count: u32,
    published: Option<(Arc<PrefixKey>, PrefixId)>,
    /// Neighbours in the free list, meaningful only while `owner_count` is 0.
    previous: u32,
    next: u32,
}

/// End of the free list.
const NONE: u32 = u32::MAX;

/// A fixed number of blocks, allocated at start. Free blocks that hold a published prefix stay findable until they are
/// needed, least recently released first.
#[derive(Debug)]
pub struct BlockPool {
    block_size: usize,
    blocks: Vec<Block>,
    first_free: u32,
    last_free: u32,
    free_count: usize,
    index: HashMap<Arc<PrefixKey>, BlockId>,
    prefix_count: u64,
    /// Published by the step in flight: their contents are promised, not yet computed.
    unproven: Vec<BlockId>,
    probe: PrefixKey,
}

impl BlockPool {
    /// `block_count` free blocks of `block_size` positions each; both at least one.
    pub fn new(block_count: usize, block_size: usize) -> Self {
        assert!(
            block_size > 0 && block_count > 0 && block_count < NONE as usize,
            "a pool has blocks and they have slots"
        );
        let mut pool = Self {
            block_size,
            blocks: Vec::with_capacity(block_count),
            first_free: NONE,
            last_free: NONE,
            free_count: 0,
            index: HashMap::with_capacity(block_count),
            prefix_count: 0,
            unproven: Vec::new(),
            probe: PrefixKey::default(),
        };
        for id in 0..block_count as u32 {
            pool.blocks.push(Block { owner_count: 0, published: None, previous: NONE, next: NONE });
            pool.free_last(BlockId(id));
        }
        pool
    }

    /// Positions of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in all.
    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody owns.
    pub fn free_count(&self) -> usize {
        self.free_count
    }

    /// Blocks that at least one sequence owns.
    pub fn used_count(&self) -> usize {
        self.blocks.len() - self.free_count
    }

    /// Blocks that `len` positions need.
    pub fn blocks_for(&self, len: usize) -> usize {
        len.div_ceil(self.block_size)
    }

    /// Positions that `table` could cover now.
    pub fn reach(&self, table: &BlockTable) -> usize {
        (table.blocks.len() + self.free_count) * self.block_size
    }

    /// Adopts the blocks that hold the continuation of `table`'s full blocks in `tokens`, a private partial block giving
    /// way to a full one. At least one token is left to compute, since its logits are wanted, and at least one free block
    /// to compute it in. Returns how many positions of the table are known then.
    pub fn reuse(&mut self, table: &mut BlockTable, tokens: &[TokenId]) -> usize {
        while let Some((block, prefix)) = self.following(table, tokens) {
            let is_partial = table.blocks.len() > table.prefix_blocks;
            let is_free = self.blocks[block.0 as usize].owner_count == 0;
            if self.free_count + usize::from(is_partial) <= usize::from(is_free) {
                break;
            }
            self.adopt(block);
            if is_partial {
                self.release_last(table);
            }
            table.blocks.push(block);
            table.prefix = prefix;
            table.prefix_blocks += 1;
        }
        table.prefix_blocks * self.block_size
    }

    /// Takes free blocks until `table` covers `len` positions, which must be within [`Self::reach`].
    pub fn grow(&mut self, table: &mut BlockTable, len: usize) {
        assert!(len <= self.reach(table), "growth beyond the free blocks");
        while table.blocks.len() * self.block_size < len {
            let block = BlockId(self.first_free);
            self.unpublish(block);
            self.adopt(block);
            table.blocks.push(block);
        }
    }

    /// Makes the full blocks among the first `len` positions of `table`, which hold `tokens`, findable. Done when their
    /// computation is planned, because a later chunk of the same step may read them; see [`Self::settle`].
    pub fn publish(&mut self, table: &mut BlockTable, tokens: &[TokenId], len: usize) {
        while (table.prefix_blocks + 1) * self.block_size <= len {
            let start = table.prefix_blocks * self.block_size;
            let known = self.find(table.prefix, &tokens[start..start + self.block_size]);
            table.prefix = match known {
                Some((_, prefix)) => prefix,
                None => self.publish_block(table.blocks[table.prefix_blocks]),
            };
            table.prefix_blocks += 1;
        }
    }

    /// The step in flight succeeded: what it published is there.
    pub fn settle(&mut self) {
        self.unproven.clear();
    }

    /// The step in flight failed: nothing it published may be found.
    pub fn forget_unproven(&mut self) {
        while let Some(block) = self.unproven.pop() {
            self.unpublish(block);
        }
    }

    /// Returns all blocks. The last goes first and so is recycled first: heads of prefixes survive longest.
    pub fn release(&mut self, table: &mut BlockTable) {
        while !table.blocks.is_empty() {
            self.release_last(table);
        }
        *table = BlockTable::default();
    }

    /// Returns all blocks, and nothing that only this table owned can be found any more: its contents are in doubt.
    pub fn discard(&mut self, table: &mut BlockTable) {
        for &block in &table.blocks {
            if self.blocks[block.0 as usize].owner_count == 1 {
                self.unpublish(block);
            }
        }
        self.release(table);
    }

    /// Whether position `start` and the following ones of `table` may be written: nobody else owns or can find them.
    pub fn is_writable(&self, table: &BlockTable, start: usize) -> bool {
        table.blocks[start / self.block_size..].iter().all(|id| {
            let block = &self.blocks[id.0 as usize];
            block.owner_count == 1 && block.published.is_none()
        })
    }

    /// Every findable block with the tokens it holds, in order of block.
    pub fn published(&self) -> impl Iterator<Item = (BlockId, &[TokenId])> {
        self.blocks.iter().enumerate().filter_map(|(id, block)| {
            block.published.as_ref().map(|(key, _)| (BlockId(id as u32), key.tokens.as_slice()))
        })
    }

    fn following(&mut self, table: &BlockTable, tokens: &[TokenId]) -> Option<(BlockId, PrefixId)> {
        let start = table.prefix_blocks * self.block_size;
        let end = start + self.block_size;
        if end < tokens.len() { self.find(table.prefix, &tokens[start..end]) } else { None }
    }

    /// Leaves the key in `probe`.
    fn find(&mut self, parent: PrefixId, tokens: &[TokenId]) -> Option<(BlockId, PrefixId)> {
        self.probe.parent = parent;
        self.probe.tokens.clear();
        self.probe.tokens.extend_from_slice(tokens);
        let block = *self.index.get(&self.probe)?;
        self.blocks[block.0 as usize].published.as_ref().map(|(_, prefix)| (block, *prefix))
    }

    /// Publishes `block` under the key in `probe`.
    fn publish_block(&mut self, block: BlockId) -> PrefixId {
        self.prefix_count += 1;
        let prefix = PrefixId(self.prefix_count);
        let key = Arc::new(self.probe.clone());
        self.index.insert(Arc::clone(&key), block);
        self.blocks[block.0 as usize].published = Some((key, prefix));
        self.unproven.push(block);
        prefix
    }

    fn unpublish(&mut self, block: BlockId) {
        if let Some((key, _)) = self.blocks[block.0 as usize].published.take() {
            self.index.remove(&key);
        }
    }

    fn adopt(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        block.owner_count += 1;
        if block.owner_count == 1 {
            self.unlink(id);
        }
    }

    fn release_last(&mut self, table: &mut BlockTable) {
        let Some(id) = table.blocks.pop() else { return };
        let block = &mut self.blocks[id.0 as usize];
        assert!(block.owner_count > 0, "a block was released twice");
        block.owner_count -= 1;
        if block.owner_count > 0 {
            return;
        }
        if block.published.is_some() { self.free_last(id) } else { self.free_first(id) }
    }

    fn free_first(&mut self, id: BlockId) {
        let next = self.first_free;
        self.link(NONE, id.0);
        self.link(id.0, next);
        self.free_count += 1;
    }

    fn free_last(&mut self, id: BlockId) {
        let previous = self.last_free;
        self.link(previous, id.0);
        self.link(id.0, NONE);
        self.free_count += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { previous, next, .. } = self.blocks[id.0 as usize];
        self.link(previous, next);
        self.free_count -= 1;
    }

    /// Makes two free blocks neighbours; [`NONE`] is the end of the list.
    fn link(&mut self, previous: u32, next: u32) {
        match self.blocks.get_mut(previous as usize) {
            Some(block) => block.next = next,
            None => self.first_free = next,
        }
        match self.blocks.get_mut(next as usize) {
            Some(block) => block.previous = previous,
            None => self.last_free = previous,
        }
    }

    /// Checks the pool against all tables that hold blocks of it: every block has as many owners as it counts, the free
    /// list holds exactly the others, the index and the blocks agree, and tables hold the tokens they are thought to.
    ///
    /// # Errors
    /// The first contradiction, in words.
    pub fn audit<'a>(&self, tables: impl Iterator<Item = (&'a BlockTable, &'a [TokenId])>) -> Result<(), String> {
        let mut owner_counts = vec![0; self.blocks.len()];
        for (table, tokens) in tables {
            self.audit_table(table, tokens)?;
            for block in &table.blocks {
                owner_counts[block.0 as usize] += 1;
            }
        }
        for (id, (block, owner_count)) in self.blocks.iter().zip(&owner_counts).enumerate() {
            if block.owner_count != *owner_count {
                return Err(format!("block {id} counts {} owners and has {owner_count}", block.owner_count));
            }
            if let Some((key, _)) = &block.published
                && self.index.get(key) != Some(&BlockId(id as u32))
            {
                return Err(format!("block {id} is published and cannot be found"));
            }
        }
        if self.blocks.iter().filter(|block| block.published.is_some()).count() != self.index.len() {
            return Err("the index knows blocks that are not published".into());
        }
        self.audit_free_list()
    }

    fn audit_table(&self, table: &BlockTable, tokens: &[TokenId]) -> Result<(), String> {
        if !(table.prefix_blocks..=table.prefix_blocks + 1).contains(&table.blocks.len()) {
            return Err(format!("a table has {} blocks, {} of them full", table.blocks.len(), table.prefix_blocks));
        }
        for (block, held) in table.blocks.iter().zip(tokens.chunks(self.block_size)) {
            if let Some((key, _)) = &self.blocks[block.0 as usize].published
                && key.tokens != held
            {
                return Err(format!("block {} is published with other tokens than its owner's", block.0));
            }
        }
        Ok(())
    }

    fn audit_free_list(&self) -> Result<(), String> {
        let (mut count, mut previous, mut id) = (0, NONE, self.first_free);
        while let Some(block) = self.blocks.get(id as usize) {
            if block.owner_count > 0 || block.previous != previous || count > self.blocks.len() {
                return Err(format!("block {id} does not belong where it is in the free list"));
            }
            (count, previous, id) = (count + 1, id, block.next);
        }
        let unowned = self.blocks.iter().filter(|block| block.owner_count == 0).count();
        if count != unowned || count != self.free_count || previous != self.last_free {
            return Err(format!(
                "{count} blocks in the free list, {} counted, {unowned} without owner",
                self.free_count
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    /// A table that covers `tokens`, computed and published.
    fn hold(pool: &mut BlockPool, tokens: &[TokenId]) -> BlockTable {
        let mut table = BlockTable::default();
        pool.reuse(&mut table, tokens);
        pool.grow(&mut table, tokens.len());
        pool.publish(&mut table, tokens, tokens.len());
        pool.settle();
        table
    }

    #[track_caller]
    fn check_reuse(pool: &mut BlockPool, tokens: &[TokenId], known: usize) {
        let mut table = BlockTable::default();
        assert_eq!(pool.reuse(&mut table, tokens), known, "{tokens:?}");
        pool.release(&mut table);
        pool.audit(std::iter::empty()).unwrap();
    }

    #[test]
    fn full_blocks_of_equal_prefixes_are_found_and_one_token_is_left() {
        let mut pool = BlockPool::new(8, 2);
        let mut table = hold(&mut pool, &[1, 2, 3, 4, 5]);
        pool.release(&mut table);
        check_reuse(&mut pool, &[1, 2, 3, 4, 5], 4);
        check_reuse(&mut pool, &[1, 2, 3, 4], 2);
        check_reuse(&mut pool, &[1, 2, 3, 5, 5], 2);
        check_reuse(&mut pool, &[1, 2], 0);
        // The second block's tokens, after another prefix and after none.
        check_reuse(&mut pool, &[9, 9, 3, 4, 5], 0);
        check_reuse(&mut pool, &[3, 4, 5], 0);
    }

    #[test]
    fn a_shared_block_is_full_and_nobody_may_write_it() {
        let mut pool = BlockPool::new(8, 2);
        let (mut one, mut two) = (hold(&mut pool, &[1, 2, 3]), hold(&mut pool, &[1, 2, 4]));
        assert_eq!(one.blocks()[0], two.blocks()[0]);
        assert_ne!(one.blocks()[1], two.blocks()[1]);
        assert!(!pool.is_writable(&one, 1) && pool.is_writable(&one, 2) && pool.is_writable(&two, 2));
        assert_eq!(pool.used_count(), 3);
        pool.audit([(&one, &[1, 2, 3][..]), (&two, &[1, 2, 4])].into_iter()).unwrap();
        assert!(pool.audit([(&one, &[1, 2, 3][..])].into_iter()).unwrap_err().contains("owners"));
        pool.release(&mut one);
        assert!(!pool.is_writable(&two, 0));
        pool.release(&mut two);
        assert_eq!(pool.free_count(), 8);
    }

    #[test]
    fn heads_of_prefixes_outlive_tails_and_unpublished_blocks_go_first() {
        let mut pool = BlockPool::new(5, 1);
        let mut table = hold(&mut pool, &[1, 2, 3, 4]);
        pool.release(&mut table);
        // One block was never used: it goes before the four, then the last of these.
        for (used, known) in [(1, 4), (2, 3), (3, 2), (4, 1), (5, 0)] {
            let mut other = BlockTable::default();
            pool.grow(&mut other, used);
            pool.release(&mut other);
            check_reuse(&mut pool, &[1, 2, 3, 4, 5], known.min(4));
        }
    }

    #[test]
    fn a_recycled_parent_hides_its_children_for_good() {
        let mut pool = BlockPool::new(4, 1);
        let mut table = hold(&mut pool, &[1, 2]);
        let mut child = BlockTable { blocks: table.blocks.split_off(1), ..BlockTable::default() };
        pool.release(&mut table);
        let mut other = BlockTable::default();
        pool.grow(&mut other, 3);
        pool.release(&mut other);
        pool.release(&mut child);
        check_reuse(&mut pool, &[1, 2, 3], 0);
        // The same prefix again, under a new identity: the old child is not its child.
        let mut table = hold(&mut pool, &[1]);
        pool.release(&mut table);
        check_reuse(&mut pool, &[1, 2, 3], 1);
    }

    #[test]
    fn a_failed_step_leaves_nothing_to_find() {
        let mut pool = BlockPool::new(4, 2);
        let mut table = BlockTable::default();
        pool.grow(&mut table, 4);
        pool.publish(&mut table, &[1, 2, 3, 4], 2);
        pool.settle();
        pool.publish(&mut table, &[1, 2, 3, 4], 4);
        pool.forget_unproven();
        check_reuse_while_held(&mut pool, &mut table, 2);
        pool.discard(&mut table);
        check_reuse(&mut pool, &[1, 2, 3, 4, 5], 0);
    }

    #[track_caller]
    fn check_reuse_while_held(pool: &mut BlockPool, held: &mut BlockTable, known: usize) {
        let mut table = BlockTable::default();
        assert_eq!(pool.reuse(&mut table, &[1, 2, 3, 4, 5]), known);
        pool.release(&mut table);
        pool.audit([(&*held, &[1, 2, 3, 4][..])].into_iter()).unwrap();
    }

    #[test]
    fn discarding_spares_what_others_hold() {
        let mut pool = BlockPool::new(8, 1);
        let (mut one, mut two) = (hold(&mut pool, &[1, 2, 3]), hold(&mut pool, &[1, 2, 4]));
        pool.discard(&mut one);
        pool.release(&mut two);
        check_reuse(&mut pool, &[1, 2, 4, 0], 3);
        check_reuse(&mut pool, &[1, 2, 3, 0], 2);
    }

    #[test]
    fn reuse_leaves_a_block_to_go_on_and_replaces_a_partial_one() {
        let mut pool = BlockPool::new(4, 2);
        let mut all = hold(&mut pool, &[1, 2, 3, 4, 5, 6]);
        pool.release(&mut all);
        let mut table = BlockTable::default();
        pool.grow(&mut table, 1);
        // Three blocks are free, all of them known; the partial block is returned for the one that replaces it.
        assert_eq!(pool.reuse(&mut table, &[1, 2, 3, 4, 5, 6, 7]), 6);
        assert_eq!((table.blocks().len(), pool.free_count()), (3, 1));
        pool.release(&mut table);
        let mut other = BlockTable::default();
        pool.grow(&mut other, 2);
        assert_eq!(pool.reuse(&mut table, &[1, 2, 3, 4, 5, 6, 7]), 4);
        assert_eq!(pool.free_count(), 1);
        pool.release(&mut table);
        pool.release(&mut other);
    }

    #[test]
    fn equal_blocks_computed_apart_continue_one_prefix() {
        let mut pool = BlockPool::new(8, 1);
        let mut tables = [BlockTable::default(), BlockTable::default()];
        for table in &mut tables {
            pool.grow(table, 2);
            pool.publish(table, &[1, 2], 2);
        }
        assert_eq!(pool.published().count(), 2);
        tables.iter_mut().for_each(|table| pool.release(table));
        check_reuse(&mut pool, &[1, 2, 3], 2);
    }
}
