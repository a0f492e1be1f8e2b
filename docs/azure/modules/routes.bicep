// The only ways out of the workspace's managed network: a private endpoint per store.
param workspace string
param names array
param stores array

resource home 'Microsoft.MachineLearningServices/workspaces@2024-10-01' existing = {
  name: workspace
}

@batchSize(1)
resource routes 'Microsoft.MachineLearningServices/workspaces/outboundRules@2024-10-01' = [
  for (store, i) in stores: {
    parent: home
    name: names[i]
    properties: {
      type: 'PrivateEndpoint'
      category: 'UserDefined'
      destination: {
        serviceResourceId: store
        subresourceTarget: 'blob'
      }
    }
  }
]
